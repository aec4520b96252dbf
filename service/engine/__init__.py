"""The engine: continuous batching over the model. Has never heard of HTTP or Prometheus."""

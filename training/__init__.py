"""Offline training: corpus to checkpoint folder. The service never imports it."""

"""The decode step in C++, compiled where it runs. Optional: without it, torch decodes."""

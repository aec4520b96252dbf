"""The model's step in C++, compiled where it runs. Optional: without it, torch serves."""

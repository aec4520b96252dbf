"""What ``python -m training`` can be asked for, a file for each command: its flags, its refusals, what it prints."""

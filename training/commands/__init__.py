"""What ``python -m training`` can be asked for, a file for each command. None imports torch before it must."""

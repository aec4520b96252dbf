"""Offline training: corpus to checkpoint folder. The service never imports it."""


class Refused(Exception):
    """What cannot be done, or went wrong on the way: one sentence for whoever asked, and no traceback."""

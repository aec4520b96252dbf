"""Speed, as ratios within one run. Nothing here decides right or wrong."""

"""What is measured rather than tested: speed as ratios within one run, recipes, routing drift, other engines."""

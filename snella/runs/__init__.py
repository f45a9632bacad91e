"""One run: training, its record, and what is measured."""

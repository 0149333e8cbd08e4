"""Facts with source and date: GPUs, models, tariffs, prices. Rows of data, read once, never edited in place."""

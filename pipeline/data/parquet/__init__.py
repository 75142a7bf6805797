"""Opens Parquet files that a stranger wrote, without trusting anything in them."""

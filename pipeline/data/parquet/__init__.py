"""Opening Parquet files that a stranger wrote."""

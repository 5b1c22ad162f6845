"""Plain engines, free of temporalio."""

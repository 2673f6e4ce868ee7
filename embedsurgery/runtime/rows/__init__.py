"""Row overrides: an adapter's rows in forward passes, without a copy of the table."""

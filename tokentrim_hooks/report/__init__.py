"""What happened: records, observers, pages. Drawing a page imports no patching code."""

"""The report of a comparison: tables, intervals, curves, a page, and passages of documents."""

"""What people and programs read: figures, tables, pages and files, all from the ledger."""

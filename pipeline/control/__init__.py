"""The loops that join decisions to the ledger; no Ray, no command line."""

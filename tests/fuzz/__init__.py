"""A fuzzer: mutates valid files and reads them with every command. ``python -m tests.fuzz`` runs it for long."""

"""The command line: one file a verb. The only place that imports click; rich is imported when something is drawn."""

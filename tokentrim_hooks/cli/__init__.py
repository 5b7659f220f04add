"""The command line: one file per subcommand, none of which imports torch before it has to."""

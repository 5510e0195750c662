"""The subcommands: where models, data and loops meet."""

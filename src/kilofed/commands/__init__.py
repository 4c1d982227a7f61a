"""What each command of the command line does with its parsed options; `kilofed.cli` imports a module when it is called."""

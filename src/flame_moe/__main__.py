"""`python -m flame_moe` is the command `flame`."""

from flame_moe.cli import main

main()

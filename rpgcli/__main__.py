"""Run `rpg` as `python -m rpgcli` (and under torchrun)."""

from rpgcli.cli import main

if __name__ == "__main__":
    main()

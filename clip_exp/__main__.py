"""Entry point of `python -m clip_exp <command>`, the same as the console script `clip-exp <command>`."""

from clip_exp.cli import main

if __name__ == "__main__":
    main()

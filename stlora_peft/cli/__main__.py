"""``python -m stlora_peft.cli``: the command line where the ``stlora`` script is not on the path."""

from stlora_peft.cli import main

if __name__ == "__main__":
    main()

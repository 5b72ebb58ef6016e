"""`python -m kdpipe.pipelines.cli`: the command line without the console script, as torchrun starts it."""

from kdpipe.pipelines.cli.main import main

if __name__ == "__main__":
    main()

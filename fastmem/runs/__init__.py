"""The folder of a run, and how a run stops on Ctrl-C so that it can be resumed."""

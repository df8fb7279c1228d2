"""What goes wrong among ranks. No tensors here: a command line must know these before it imports PyTorch."""


class RankError(RuntimeError):
    """One of the ranks has failed, and so all have ended. The message says which, and why. It stays so."""


class SumBroken(RuntimeError):
    """A sum between machines has failed: most likely one of the others has died."""

"""The user's mistakes: each message says what was wrong, what was found and what to do; the command exits with 2, or 3."""


class RecsysError(Exception):
    """A mistake that the user can mend."""


class DataError(RecsysError):
    """Events, items or a data set are not what they must be."""


class RecipeError(RecsysError):
    """A recipe names something unknown or gives a wrong value."""


class BundleError(RecsysError):
    """A run or bundle is incomplete, altered or of another version."""


class RequestError(RecsysError):
    """A recommendation was asked for in a way that has no answer."""


class SetupError(RecsysError):
    """A dependency, a device or a service that the work needs is not there."""


class StoreError(RecsysError):
    """A store of histories is unreachable or broken: its server down, its file gone, its disk full, its content unreadable."""


class GuardError(RecsysError):
    """What was made is not as its rules want it, so that the last night, or the champion, stays; the command exits with 3."""


class LeakError(GuardError):
    """A data set, or a model, tells of what is not known yet: events are learnt or read that the split keeps for later."""

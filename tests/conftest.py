"""Settings of all tests."""

from hypothesis import settings

# The machine is shared: how long an example takes says nothing, so no test may fail by the clock.
settings.register_profile("pertoken", deadline=None, print_blob=True)
settings.load_profile("pertoken")

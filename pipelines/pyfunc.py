"""Models that were registered earlier name this module as their loader. It moved to `pipelines.tracking.pyfunc`."""

from pipelines.tracking.pyfunc import _load_pyfunc as _load_pyfunc

"""Older cluster files start this on a node (`python -m pipelines.notice`). It moved to `pipelines.clusterfile.preemption`."""

from pipelines.clusterfile.preemption import main

if __name__ == "__main__":
    raise SystemExit(main())

"""One file per step that a user runs. Ray Train and MLflow live here; no maths."""

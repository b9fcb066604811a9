"""Many runs: spaces, sweeps and the papers' figures from your own runs."""

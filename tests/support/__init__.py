"""Code that tests share: ranks, hosts, fake servers, small configs."""

"""What tests share: ranks, hosts, servers that are played, small configs."""

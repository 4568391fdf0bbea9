"""How it is embedded: leases, packing, embedders, the integrity gate, checkpoints, the commit of a shard."""

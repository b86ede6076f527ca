"""What runs on a Ray cluster: training workers, sweeps and the stream of data. The only importer of ray."""

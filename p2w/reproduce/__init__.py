"""The paper's Tables 1 and 2 and Fig. 3: sweeps of runs, and tables from their folders beside the paper's numbers."""

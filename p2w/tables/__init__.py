"""The paper's tables and Fig. 3 from run folders, beside the paper's own numbers."""

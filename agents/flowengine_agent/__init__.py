"""The daemon of a site: it offers folders, carries data for transfers, and obeys signed grants alone."""

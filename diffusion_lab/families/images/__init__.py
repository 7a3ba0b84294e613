"""No family of models, but images that another program drew, which are opened as runs are."""

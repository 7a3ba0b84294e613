"""Code that several tests share; processes started by tests import it too, as `helpers`."""

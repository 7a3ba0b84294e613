"""What several tests share; the processes that tests start find it too, as `helpers`."""

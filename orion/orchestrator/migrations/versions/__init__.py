"""One file a step, named by its number. What has been released is never changed."""

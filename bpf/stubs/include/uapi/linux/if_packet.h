/* Empty on purpose: nothing of it is used. */

#!/bin/sh
# Make a guest's root a tmpfs with what was in the old one: links as they are, directories as mounts.
#
# In the old one, which is 9p, every path that goes through /lib64, /bin or /lib asks the host, again and again: of the
# 217 ms that `ip` takes to start in an emulated Linux 5.10 two thirds are that. Where it fails the old root stays.
set -e
new=/run/root
mkdir "$new"
mount --make-rprivate /
mount -t tmpfs -o mode=755 root "$new"
mount --make-unbindable "$new" # not into itself, with /run
for each in /*; do
    if [ -h "$each" ]; then
        cp -a "$each" "$new"
    elif [ -d "$each" ]; then
        mkdir "$new$each"
        mount --rbind "$each" "$new$each"
    fi
done
mkdir "$new/old"
cd "$new"
pivot_root . old
umount -l /old
rmdir /old

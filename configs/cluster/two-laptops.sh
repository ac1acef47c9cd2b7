#!/usr/bin/env bash
# A run on two machines of a home network, by Open MPI or MPICH. Both have one folder under the same path (NFS, sshfs) with the same
# program in it, and the same kind of CPU; each reaches the other by ssh without a password.
#
#   configs/cluster/two-laptops.sh HERE THERE NETWORK RUN.toml [ARGUMENTS OF lowkey train ...]
#   configs/cluster/two-laptops.sh ann bob 192.168.1.0/24 configs/quickstart.toml
#
# To be started in that folder, on HERE, whose terminal shows the run. Ctrl-C stops both after their step, with a checkpoint, and the same
# command with --resume goes on. NETWORK is what they share: addresses (Open MPI), or the name of an interface that both have. From the
# environment: LOWKEY, the program [target/release/lowkey]; MPIRUN, what starts ranks [mpirun].
set -euo pipefail
here=${1:?HERE} there=${2:?THERE} network=${3:?NETWORK} run=${4:?RUN.toml}
shift 4
mpirun=${MPIRUN:-mpirun} lowkey=$(realpath "${LOWKEY:-target/release/lowkey}")

# TCP over the network that is named, and no other: laptops have bridges and tunnels beside it, which lead nowhere.
case $("$mpirun" --version) in
    *"Open MPI"*)
        exec "$mpirun" -n 2 --host "$here:1,$there:1" --bind-to none -wdir "$PWD" \
            --mca btl tcp,self --mca btl_tcp_if_include "$network" --mca oob_tcp_if_include "$network" "$lowkey" train "$run" "$@"
        ;;
    *)
        exec "$mpirun" -n 2 -hosts "$here,$there" -iface "$network" -wdir "$PWD" "$lowkey" train "$run" "$@"
        ;;
esac

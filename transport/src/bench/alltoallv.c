/* MPI_Alltoallv from a barrier to the last byte: alltoallv BYTES_PER_PEER WARM_UP ITERATIONS.
   Rank 0 prints the CPU time of all ranks, ns, then one time per iteration, ns: that of the slowest rank. */
#include <mpi.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>

static double cpu_ns(void) {
  struct rusage usage;
  getrusage(RUSAGE_SELF, &usage);
  return (usage.ru_utime.tv_sec + usage.ru_stime.tv_sec) * 1e9 +
         (usage.ru_utime.tv_usec + usage.ru_stime.tv_usec) * 1e3;
}

int main(int argc, char **argv) {
  MPI_Init(&argc, &argv);
  int rank, ranks;
  MPI_Comm_rank(MPI_COMM_WORLD, &rank);
  MPI_Comm_size(MPI_COMM_WORLD, &ranks);
  if (argc != 4) MPI_Abort(MPI_COMM_WORLD, 2);
  int bytes = atoi(argv[1]), warm_up = atoi(argv[2]), all = warm_up + atoi(argv[3]);
  char *send = malloc((size_t)bytes * ranks), *receive = malloc((size_t)bytes * ranks);
  int *counts = calloc(ranks, sizeof(int)), *starts = calloc(ranks, sizeof(int));
  double *times = calloc(all, sizeof(double)), *slowest = calloc(all, sizeof(double));
  if (!send || !receive || !counts || !starts || !times || !slowest) MPI_Abort(MPI_COMM_WORLD, 1);
  memset(send, 7, (size_t)bytes * ranks);
  memset(receive, 0, (size_t)bytes * ranks);
  for (int peer = 0; peer < ranks; peer++) {
    counts[peer] = peer == rank ? 0 : bytes;
    starts[peer] = peer * bytes;
  }
  MPI_Barrier(MPI_COMM_WORLD);
  double before = cpu_ns();
  for (int at = 0; at < all; at++) {
    MPI_Barrier(MPI_COMM_WORLD);
    double start = MPI_Wtime();
    MPI_Alltoallv(send, counts, starts, MPI_BYTE, receive, counts, starts, MPI_BYTE, MPI_COMM_WORLD);
    times[at] = (MPI_Wtime() - start) * 1e9;
  }
  double spent = cpu_ns() - before, total = 0;
  MPI_Reduce(&spent, &total, 1, MPI_DOUBLE, MPI_SUM, 0, MPI_COMM_WORLD);
  MPI_Reduce(times, slowest, all, MPI_DOUBLE, MPI_MAX, 0, MPI_COMM_WORLD);
  if (rank == 0) {
    printf("%.0f\n", total);
    for (int at = warm_up; at < all; at++) printf("%.0f\n", slowest[at]);
  }
  MPI_Finalize();
  return 0;
}

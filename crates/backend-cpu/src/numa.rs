//! Memory that is near to some cores and far from others: which CPUs belong to which node, and what goes where.
//!
//! With one node there is nothing to do and nothing is done. With more, threads are pinned node by node, the groups of
//! every packed matrix are divided into one range per node and packed by a thread of that node, whose memory they then
//! lie in (the first touch decides), and a thread takes tasks of its own node's range before it helps others.

use std::{fs, ops::Range, path::Path};

/// Nodes that are told apart. Machines with more share the last one.
pub(crate) const NODES_MAX: usize = 8;
/// CPU numbers above are no CPUs.
const CPUS_MAX: usize = 8192;

/// The CPUs of each node that this process may use.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Topology {
    /// Fewer than two when there is nothing to tell apart.
    nodes: Vec<Vec<usize>>,
}

/// A topology and the threads that work on it.
#[derive(Debug, Clone)]
pub(crate) struct Nodes {
    topology: Topology,
    /// First thread of each node, and the number of threads; just `[0, threads]` for one node.
    first_thread: Vec<usize>,
}

impl Topology {
    /// Reads it off a running system; `root` is `/` but in tests. What cannot be read or makes no sense is one node.
    pub(crate) fn read(root: &Path) -> Self {
        Self { nodes: Self::nodes_in(root).filter(|nodes| nodes.len() > 1).unwrap_or_default() }
    }

    fn nodes_in(root: &Path) -> Option<Vec<Vec<usize>>> {
        let list = |path: &str| cpu_list(fs::read_to_string(root.join(path)).ok()?.trim());
        let status = fs::read_to_string(root.join("proc/self/status")).ok()?;
        let allowed = status.lines().find_map(|l| l.strip_prefix("Cpus_allowed_list:"))?;
        let allowed = cpu_list(allowed.trim())?;
        // Not every system says which CPUs are online; then a node lists no others.
        let online = list("sys/devices/system/cpu/online");
        let usable = |cpu: &usize| allowed.contains(cpu) && online.as_ref().is_none_or(|o| o.contains(cpu));
        let (mut nodes, mut homeless) = (Vec::new(), Vec::new());
        for node in list("sys/devices/system/node/online")? {
            let folder = format!("sys/devices/system/node/node{node}");
            let mut cpus = list(&format!("{folder}/cpulist"))?;
            cpus.retain(usable);
            let memory = fs::read_to_string(root.join(format!("{folder}/meminfo"))).ok()?;
            match (has_memory(&memory)?, cpus.is_empty()) {
                (true, false) => nodes.push(cpus),
                (false, false) => homeless.extend(cpus),
                // Memory without CPUs is nobody's near memory.
                (_, true) => {}
            }
        }
        if nodes.len() > NODES_MAX {
            let rest = nodes.split_off(NODES_MAX).concat();
            nodes[NODES_MAX - 1].extend(rest);
        }
        // CPUs without memory of their own have to work somewhere.
        nodes.first_mut()?.extend(homeless);
        Some(nodes)
    }
}

impl Nodes {
    /// Threads in proportion to the CPUs of the nodes; nodes that get no thread are left out.
    pub(crate) fn new(topology: Topology, threads: usize) -> Self {
        let all: usize = topology.nodes.iter().map(Vec::len).sum();
        let (mut nodes, mut first_thread, mut cpus) = (Vec::new(), vec![0], 0);
        for node in topology.nodes {
            cpus += node.len();
            let end = threads * cpus / all;
            if first_thread.last().is_some_and(|first| end > *first) {
                first_thread.push(end);
                nodes.push(node);
            }
        }
        if nodes.len() < 2 {
            return Self { topology: Topology::default(), first_thread: vec![0, threads.max(1)] };
        }
        Self { topology: Topology { nodes }, first_thread }
    }

    /// How many there are: one where nothing is told apart.
    pub(crate) fn count(&self) -> usize {
        self.first_thread.len() - 1
    }

    /// The node of a thread.
    pub(crate) fn of_thread(&self, thread: usize) -> usize {
        (self.first_thread.partition_point(|first| *first <= thread) - 1).min(self.count() - 1)
    }

    /// The part of `n` things (tasks, groups of rows) that belongs to a node: a share as large as its threads.
    pub(crate) fn range(&self, node: usize, n: usize) -> Range<usize> {
        let threads = self.first_thread[self.count()];
        let bound = |node: usize| n * self.first_thread[node] / threads;
        bound(node)..bound(node + 1)
    }

    /// The part of a node's range that belongs to a thread.
    pub(crate) fn share(&self, thread: usize, n: usize) -> Range<usize> {
        let node = self.of_thread(thread);
        let (range, threads) = (self.range(node, n), self.threads(node));
        let bound = |thread: usize| range.start + range.len() * (thread - threads.start) / threads.len();
        bound(thread)..bound(thread + 1)
    }

    fn threads(&self, node: usize) -> Range<usize> {
        self.first_thread[node]..self.first_thread[node + 1]
    }

    /// All threads, from a thread's own point of view: itself, those of its node, the others.
    pub(crate) fn nearest(&self, thread: usize) -> impl Iterator<Item = usize> + use<> {
        let (near, all) = (self.threads(self.of_thread(thread)), self.first_thread[self.count()]);
        let own = (thread..near.end).chain(near.start..thread);
        own.chain(near.end..all).chain(0..near.start)
    }

    /// The node that thing `i` of `n` belongs to.
    pub(crate) fn of(&self, i: usize, n: usize) -> usize {
        (0..self.count()).find(|node| self.range(*node, n).contains(&i)).unwrap_or(0)
    }

    /// An order of tasks in which those of a node follow each other; `None` for one node. `part` tells which thing of
    /// how many a task works on.
    pub(crate) fn order(&self, tasks: usize, part: impl Fn(usize) -> (usize, usize)) -> Option<Vec<usize>> {
        if self.count() == 1 {
            return None;
        }
        let mut order: Vec<usize> = (0..tasks).collect();
        order.sort_by_key(|task| {
            let (i, n) = part(*task);
            self.of(i, n)
        });
        Some(order)
    }

    /// Makes the calling thread run on the CPUs of a node only. A system that refuses leaves it where it is: it is
    /// slower then, and as right.
    pub(crate) fn enter(&self, node: usize) {
        if self.count() > 1 {
            pin(&self.topology.nodes[node]);
        }
    }
}

#[cfg(target_os = "linux")]
fn pin(cpus: &[usize]) {
    let mut set = rustix::thread::CpuSet::new();
    cpus.iter().filter(|cpu| **cpu < rustix::thread::CpuSet::MAX_CPU).for_each(|cpu| set.set(*cpu));
    let _ = rustix::thread::sched_setaffinity(None, &set);
}

#[cfg(not(target_os = "linux"))]
fn pin(_cpus: &[usize]) {}

/// `0-3,8,10-11`; `None` for anything else.
fn cpu_list(text: &str) -> Option<Vec<usize>> {
    let mut cpus = Vec::new();
    for part in text.split(',').filter(|p| !p.is_empty()) {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let (first, last) = (first.parse::<usize>().ok()?, last.parse::<usize>().ok()?);
        if first > last || last >= CPUS_MAX {
            return None;
        }
        cpus.extend(first..=last);
    }
    Some(cpus)
}

/// Whether a node's `meminfo` has memory: `Node 0 MemTotal: 123 kB`.
fn has_memory(meminfo: &str) -> Option<bool> {
    let line = meminfo.lines().find_map(|l| l.split_once("MemTotal:"))?;
    line.1.trim().strip_suffix("kB")?.trim().parse::<u64>().ok().map(|kib| kib > 0)
}

#[cfg(test)]
pub(crate) mod tests {
    use std::path::PathBuf;

    use super::*;

    /// A system with two nodes of these many CPUs, none of which need exist.
    pub(crate) fn two_nodes(first: usize, second: usize) -> Topology {
        Topology { nodes: vec![(0..first).collect(), (first..first + second).collect()] }
    }

    /// A faked tree, removed at the end.
    struct Tree(PathBuf);

    impl Tree {
        /// Nodes as (cpulist, kB of memory).
        fn new(name: &str, allowed: &str, nodes: &[(&str, &str)]) -> Self {
            let tree = Self(std::env::temp_dir().join(format!("oxseek-numa-{}-{name}", std::process::id())));
            tree.write("proc/self/status", &format!("Name:\toxseek\nCpus_allowed_list:\t{allowed}\n"));
            tree.write("sys/devices/system/node/online", &format!("0-{}\n", nodes.len() - 1));
            for (i, (cpus, memory)) in nodes.iter().enumerate() {
                let folder = format!("sys/devices/system/node/node{i}");
                tree.write(&format!("{folder}/cpulist"), &format!("{cpus}\n"));
                let meminfo = format!("Node {i} MemTotal:       {memory} kB\nNode {i} MemFree: 1 kB\n");
                tree.write(&format!("{folder}/meminfo"), &meminfo);
            }
            tree
        }

        fn write(&self, path: &str, text: &str) {
            let path = self.0.join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }

        fn nodes(&self) -> Vec<Vec<usize>> {
            Topology::read(&self.0).nodes
        }
    }

    impl Drop for Tree {
        fn drop(&mut self) {
            let _ = fs::remove_dir_all(&self.0);
        }
    }

    #[test]
    fn one_node_is_nothing_to_tell_apart() {
        assert!(Tree::new("one", "0-3", &[("0-3", "1000")]).nodes().is_empty());
        assert!(Topology::read(Path::new("/no such folder")).nodes.is_empty());
    }

    #[test]
    fn two_nodes_have_the_cpus_that_may_be_used() {
        let nodes = [("0-1,4-5", "1000"), ("2-3,6-7", "1000")];
        assert_eq!(Tree::new("two", "0-7", &nodes).nodes(), [[0, 1, 4, 5], [2, 3, 6, 7]]);
        assert_eq!(Tree::new("cpuset", "1,3,6", &nodes).nodes(), [vec![1], vec![3, 6]]);
        assert!(Tree::new("cpuset-of-one", "0-1,4", &nodes).nodes().is_empty());
        let offline = Tree::new("offline", "0-7", &nodes);
        offline.write("sys/devices/system/cpu/online", "0-4,6\n");
        assert_eq!(offline.nodes(), [vec![0, 1, 4], vec![2, 3, 6]]);
    }

    #[test]
    fn nodes_without_memory_or_without_cpus() {
        let nodes = [("0-1", "1000"), ("2-3", "0"), ("", "5000"), ("4-5", "1000")];
        assert_eq!(Tree::new("odd", "0-7", &nodes).nodes(), [vec![0, 1, 2, 3], vec![4, 5]]);
        assert!(Tree::new("no-memory", "0-3", &[("0-1", "0"), ("2-3", "0")]).nodes().is_empty());
    }

    #[test]
    fn garbage_is_one_node() {
        for (i, cpus) in ["3-1", "0-99999999", "a", "1-", "0x3"].iter().enumerate() {
            let nodes = [("0-1", "1000"), (*cpus, "1000")];
            assert!(Tree::new(&format!("garbage-{i}"), "0-7", &nodes).nodes().is_empty(), "{cpus}");
        }
        assert!(Tree::new("memory", "0-3", &[("0-1", "much"), ("2-3", "1")]).nodes().is_empty());
        let more: Vec<String> = (0..20).map(|n| n.to_string()).collect();
        let more: Vec<(&str, &str)> = more.iter().map(|n| (n.as_str(), "1000")).collect();
        let found = Tree::new("many", "0-19", &more).nodes();
        assert_eq!((found.len(), found[NODES_MAX - 1].len()), (NODES_MAX, 13));
    }

    #[test]
    fn threads_and_ranges_follow_the_cpus() {
        let nodes = Nodes::new(two_nodes(6, 2), 4);
        assert_eq!([0, 1, 2, 3].map(|t| nodes.of_thread(t)), [0, 0, 0, 1]);
        assert_eq!([nodes.range(0, 10), nodes.range(1, 10)], [0..7, 7..10]);
        assert_eq!((nodes.of(6, 10), nodes.of(7, 10)), (0, 1));
        for n in 0..20 {
            let all: Vec<usize> = (0..2).flat_map(|node| nodes.range(node, n)).collect();
            assert_eq!(all, (0..n).collect::<Vec<_>>());
        }
        let alone = Nodes::new(two_nodes(6, 2), 1);
        assert_eq!((alone.count(), alone.of_thread(0), alone.range(0, 9)), (1, 0, 0..9));
    }

    #[test]
    fn shares_follow_each_other_and_threads_look_near_first() {
        let nodes = Nodes::new(two_nodes(6, 2), 4);
        assert_eq!(nodes.nearest(1).collect::<Vec<_>>(), [1, 2, 0, 3]);
        assert_eq!(nodes.nearest(3).collect::<Vec<_>>(), [3, 0, 1, 2]);
        for nodes in [nodes, Nodes::new(Topology::default(), 4)] {
            for n in 0..20 {
                let all: Vec<usize> = (0..4).flat_map(|thread| nodes.share(thread, n)).collect();
                assert_eq!(all, (0..n).collect::<Vec<_>>());
            }
        }
    }

    #[test]
    fn tasks_are_ordered_by_the_node_of_their_rows() {
        let nodes = Nodes::new(two_nodes(2, 2), 4);
        // Two matrices of four parts each.
        let order = nodes.order(8, |task| (task % 4, 4));
        assert_eq!(order, Some(vec![0, 1, 4, 5, 2, 3, 6, 7]));
        assert_eq!(Nodes::new(Topology::default(), 4).order(8, |task| (task, 8)), None);
    }
}

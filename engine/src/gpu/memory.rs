//! How much memory an adapter has and how much of it is left: Vulkan tells of devices, the operating system of the
//! host, whose memory a CPU's is; elsewhere nothing is said.

/// Bytes of an adapter's own memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
pub struct DeviceMemory {
    /// All that there is.
    pub total_bytes: u64,
    /// What this process may still allocate without hurting others, where the driver tells.
    pub free_bytes: Option<u64>,
}

/// Of an adapter, of which `is_cpu` says whether it computes on the host.
pub(super) fn of(adapter: &wgpu::Adapter, is_cpu: bool) -> Option<DeviceMemory> {
    let host = is_cpu.then(crate::os::host_memory).flatten();
    host.map(|(total_bytes, free)| DeviceMemory { total_bytes, free_bytes: Some(free) })
        .or_else(|| heap(adapter))
}

/// Of the largest heap that is the device's own.
#[cfg(not(target_vendor = "apple"))]
fn heap(adapter: &wgpu::Adapter) -> Option<DeviceMemory> {
    use ash::vk;
    // SAFETY: the guard keeps the adapter alive, and nothing of it is destroyed here.
    let hal = unsafe { adapter.as_hal::<wgpu::hal::api::Vulkan>() }?;
    let has_budget = hal.physical_device_capabilities().supports_extension(ash::ext::memory_budget::NAME);
    let mut budget = vk::PhysicalDeviceMemoryBudgetPropertiesEXT::default();
    let mut all = vk::PhysicalDeviceMemoryProperties2::default();
    if has_budget {
        all = all.push_next(&mut budget);
    }
    let instance = hal.shared_instance().raw_instance();
    // SAFETY: instance and device are alive as above; the chained structure is one that the device supports.
    unsafe { instance.get_physical_device_memory_properties2(hal.raw_physical_device(), &mut all) };
    let memory = all.memory_properties;
    let own = |heap: &vk::MemoryHeap| heap.flags.contains(vk::MemoryHeapFlags::DEVICE_LOCAL);
    let heaps = memory.memory_heaps.iter().take(memory.memory_heap_count as usize).enumerate();
    let (index, heap) = heaps.filter(|(_, heap)| own(heap)).max_by_key(|(_, heap)| heap.size)?;
    let free = has_budget.then(|| budget.heap_budget[index].saturating_sub(budget.heap_usage[index]));
    Some(DeviceMemory { total_bytes: heap.size, free_bytes: free })
}

#[cfg(target_vendor = "apple")]
fn heap(_adapter: &wgpu::Adapter) -> Option<DeviceMemory> {
    None
}

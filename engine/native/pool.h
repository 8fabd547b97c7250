// Threads that share one call's work; made when a call first asks for more than one.
#pragma once

#include <atomic>
#include <condition_variable>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

namespace prelay {

class Pool {
public:
    // Calls work(part) for part = 0 .. parts - 1, one of them on this thread; returns when all are done.
    void run(size_t parts, const std::function<void(size_t)>& work) {
        if (parts <= 1) return work(0);
        std::unique_lock lock(mutex_);
        while (threads_.size() < parts - 1) {
            size_t part = threads_.size() + 1;
            threads_.emplace_back([this, part, seen = round_] { serve(part, seen); });
            threads_.back().detach();
        }
        work_ = &work;
        parts_ = parts;
        left_ = parts - 1;
        round_++;
        started_.notify_all();
        lock.unlock();
        work(0);
        lock.lock();
        finished_.wait(lock, [&] { return left_ == 0; });
    }

private:
    void serve(size_t part, size_t seen) {
        std::unique_lock lock(mutex_);
        for (;;) {
            started_.wait(lock, [&] { return round_ != seen; });
            seen = round_;
            if (part >= parts_) continue;
            auto* work = work_;
            lock.unlock();
            (*work)(part);
            lock.lock();
            if (--left_ == 0) finished_.notify_one();
        }
    }

    std::mutex mutex_;
    std::condition_variable started_, finished_;
    std::vector<std::thread> threads_;
    const std::function<void(size_t)>* work_ = nullptr;
    size_t parts_ = 0, left_ = 0, round_ = 0;
};

}  // namespace prelay
